"""What measures the paper's claims. Nothing here is needed to use the method."""
