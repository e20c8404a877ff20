def build_report(run):
    (run/"report.html").write_text("")
    return run/"report.html"
