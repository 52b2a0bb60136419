"""What a release is checked by before anybody gets it."""
