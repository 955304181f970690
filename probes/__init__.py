"""What a trained network is like: capacity, copies, speed."""
