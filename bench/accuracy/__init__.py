"""What a small vision-language model still answers when vision tokens are dropped, and by whom."""
