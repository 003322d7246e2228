"""Named data sets, a file each, and parquet in their columns."""
