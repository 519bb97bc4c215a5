"""Images as samples."""
