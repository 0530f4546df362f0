"""What an application imports: managers, memories, guards, notices."""
