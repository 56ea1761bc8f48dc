"""What stands below the five files, tokenizers to guards of a run: imports none of them, nor reports."""
