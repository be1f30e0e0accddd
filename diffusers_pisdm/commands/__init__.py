"""The commands of `pisdm`, one file each."""
