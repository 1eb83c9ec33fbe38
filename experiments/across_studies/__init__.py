"""What is measured on the layers of several studies at once; it may import studies, no study imports it."""
