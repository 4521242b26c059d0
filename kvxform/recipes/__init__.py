"""Bundled recipes, one YAML file each, and their JSON schema; `kvxform.recipe` reads them."""
