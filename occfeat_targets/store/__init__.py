"""The contract between the two programs: what a targets store is, and how to read one. All that the
trainer imports of the offline side. Needs numpy, zarr, fsspec and pydantic alone."""
