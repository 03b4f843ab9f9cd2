"""The drawn scenes, and the main job on them."""
