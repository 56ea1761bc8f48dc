"""What no reader of the method needs: safe pickles, files, the hub, a data set's check, one clip, reports."""
