"""Decode images, make views of them, and turn them into pixel values."""

from .decoding import decode_image
from .preprocessing import build_image_processor, pixel_values
from .views import ViewRecipe, make_view, make_views, row_key


__all__ = ["ViewRecipe", "build_image_processor", "decode_image", "make_view", "make_views", "pixel_values", "row_key"]
