"""Reports of runs, comparisons, plans and data: tables, sentences, figures, pages."""
