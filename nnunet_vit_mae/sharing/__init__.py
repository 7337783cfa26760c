"""What `mae3d_share` writes: the folder of an encoder as the Hugging Face hub has it."""
