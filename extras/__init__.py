"""What no reader of the method needs: safe pickles, files, the hub, the check of a data set, one clip, reports."""
