"""The launchers of the backend `torch`, which are written with torch's own operators."""
