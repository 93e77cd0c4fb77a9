"""The drivers of methods that see a layer or a group: one block after another, with its calibration inputs."""
