"""What the Tenfold methods share: the `tenfold` command, training, data, and claims with their report."""
