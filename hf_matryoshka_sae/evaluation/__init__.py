"""What an SAE is worth."""
