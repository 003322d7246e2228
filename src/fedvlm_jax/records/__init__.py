"""Records of files that strangers wrote, made the rows of a table; `forms/` says which files these are."""
