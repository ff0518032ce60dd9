"""What each bit budget is best spent on: the study behind Sixfold's defaults (docs/recipe.md)."""
