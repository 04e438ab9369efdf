"""What measures the paper's claims: criteria, trainings and tasks. Nothing here is needed to use the method."""
