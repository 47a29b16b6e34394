"""The one loop and its stages."""
