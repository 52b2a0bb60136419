"""Measures of the code itself: what the bars of the house are held to."""
