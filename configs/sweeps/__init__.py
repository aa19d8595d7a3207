"""Configs that stand for many: what varies over the base config."""
