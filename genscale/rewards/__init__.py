"""What an answer or a picture is worth: rewards that a config chooses by name (`genscale.rewards.registry`)."""
