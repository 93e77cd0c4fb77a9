"""The recipe: one YAML file that names a model, texts, steps, measurements and exports."""

from sparsekit.recipe.entries import TextEntry
from sparsekit.recipe.reading import checked, load_plugins, read_overridden, read_recipe, recipe_schema, refuse_code
from sparsekit.recipe.schema import Recipe
from sparsekit.recipe.step import Step

__all__ = [
    "Recipe", "Step", "TextEntry", "checked", "load_plugins", "read_overridden", "read_recipe", "recipe_schema",
    "refuse_code",
]  # fmt: skip
