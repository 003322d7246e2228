"""Questions to the models of a finished run, from the command line and on a local page."""
