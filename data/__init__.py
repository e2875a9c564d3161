"""What is trained on, and where it came from: values, recipes, prompts, the journal. Imports nothing heavy."""
