"""What steps find out; each yields its findings one by one."""
