"""Tables, pictures, and the human study."""
