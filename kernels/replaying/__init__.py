"""Launches of a layer, recorded for others of its sizes."""
