"""From pixels to kept rows."""
