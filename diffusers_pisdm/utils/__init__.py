"""Files, machines and grids of images: what all parts of the package use and none owns."""
