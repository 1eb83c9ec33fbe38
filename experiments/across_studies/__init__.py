"""Measurements on the layers of several studies. It may import studies; no study imports it."""
