// What a run reports: metrics.jsonl (one JSON object per line, append-only, flushed) and the live terminal line.
#pragma once
#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

// A value of a metrics line, already as JSON text.
struct Field {
    std::string name, json;
    Field(const char* n, double v);         // shortest form that reads back to the same bits; NaN and Inf become null
    Field(const char* n, int64_t v);
    Field(const char* n, const std::string& v);
    Field(const char* n, const char* v) : Field(n, std::string(v)) {}
    Field(const char* n, bool v);
};

class MetricsFile {
  public:
    // Appends to path. A last line that a crash cut short is ended first, so that every later line stands alone.
    explicit MetricsFile(const std::string& path);
    ~MetricsFile();
    MetricsFile(const MetricsFile&) = delete;
    // {"event": event, "time": unix seconds, fields…}. Throws UserError if the line cannot be written.
    void write(const char* event, const std::vector<Field>& fields);

  private:
    std::string path_;
    FILE* file_;
};

// Progress on standard output: one line that rewrites itself on a terminal, plain lines every few seconds elsewhere.
class ProgressLine {
  public:
    ProgressLine();
    ~ProgressLine();
    void show(const std::string& text, bool force);  // force: print even if one was printed a moment ago
    void note(const std::string& text);              // a line that stays
  private:
    bool terminal_;
    double last_ = 0;
    size_t width_ = 0;
};

double wall_seconds();                        // monotonic
std::string human_duration(double seconds);   // 2h05m, 3m20s, 12s
std::string human_count(double value);        // 1.46M, 812k, 523
