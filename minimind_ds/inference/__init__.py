"""What a trained model says: chat and score."""
