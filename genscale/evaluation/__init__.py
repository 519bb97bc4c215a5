"""What a trained model is worth: held-out likelihood and samples."""
