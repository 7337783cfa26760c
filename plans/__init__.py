"""Recipes: partial `vit_mae` blocks for `mae3d_plan --recipe`, as JSON."""
