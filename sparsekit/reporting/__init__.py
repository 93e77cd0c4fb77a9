"""Reports: sentences, tables and drawings, and the pages they make. Nothing here prints or measures."""
