"""What a generator is worth: protocols, statistics, distances, and pictures. Images in, numbers out."""
