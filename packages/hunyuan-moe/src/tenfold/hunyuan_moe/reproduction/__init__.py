"""What measures the paper's claims: criteria and trainings. Nothing here is needed to use the method."""
