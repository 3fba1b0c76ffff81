"""What a user writes: a job's YAML file, read, checked, and made into models and batches."""
