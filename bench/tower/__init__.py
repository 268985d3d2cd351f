"""What each step of doing less in a vision tower saves."""
