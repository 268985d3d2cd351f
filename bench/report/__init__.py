"""Documents and pictures from the files of results: no figure is typed by hand."""
