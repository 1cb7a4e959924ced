"""What a run keeps on the disk, and how it goes on from there."""
