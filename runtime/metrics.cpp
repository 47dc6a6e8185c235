#include "runtime/metrics.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

#include "runtime/error.h"

using json = nlohmann::ordered_json;

Field::Field(const char* n, double v) : name(n), json(std::isfinite(v) ? ::json(v).dump() : "null") {}
Field::Field(const char* n, int64_t v) : name(n), json(std::to_string(v)) {}
Field::Field(const char* n, const std::string& v) : name(n), json(::json(v).dump(-1, ' ', false, ::json::error_handler_t::replace)) {}
Field::Field(const char* n, bool v) : name(n), json(v ? "true" : "false") {}

MetricsFile::MetricsFile(const std::string& path) : path_(path) {
    bool torn = false;
    if (FILE* existing = std::fopen(path.c_str(), "rb")) {
        if (std::fseek(existing, -1, SEEK_END) == 0) torn = std::fgetc(existing) != '\n';
        std::fclose(existing);
    }
    file_ = std::fopen(path.c_str(), "ab");
    if (!file_) throw UserError("cannot write " + path + ": " + std::strerror(errno));
    if (torn) std::fputc('\n', file_);
}

MetricsFile::~MetricsFile() { std::fclose(file_); }

void MetricsFile::write(const char* event, const std::vector<Field>& fields) {
    double now = std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
    std::string line = "{\"event\": \"" + std::string(event) + "\", \"time\": " + format("%.3f", now);
    for (const Field& f : fields) line += ", \"" + f.name + "\": " + f.json;
    line += "}\n";
    if (std::fwrite(line.data(), 1, line.size(), file_) != line.size() || std::fflush(file_) != 0) {
        int error = errno;
        std::clearerr(file_);
        throw UserError("cannot write " + path_ + ": " + std::strerror(error));
    }
}

ProgressLine::ProgressLine() : terminal_(isatty(STDOUT_FILENO)) {}

ProgressLine::~ProgressLine() {
    if (terminal_ && width_) std::printf("\n");
    std::fflush(stdout);
}

void ProgressLine::show(const std::string& text, bool force) {
    double now = wall_seconds();
    if (!force && now - last_ < (terminal_ ? 0.1 : 5.0)) return;
    last_ = now;
    if (terminal_) {
        std::printf("\r%-*s", int(width_), text.c_str());
        width_ = text.size();
    } else {
        std::printf("%s\n", text.c_str());
    }
    std::fflush(stdout);
}

void ProgressLine::note(const std::string& text) {
    if (terminal_ && width_) std::printf("\r%-*s\r", int(width_), "");
    width_ = 0;
    std::printf("%s\n", text.c_str());
    std::fflush(stdout);
}

double wall_seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string human_duration(double s) {
    if (!(s >= 0) || s > 1e9) return "?";
    long long t = (long long)(s + 0.5);
    if (t >= 86400) return format("%lldd%02lldh", t / 86400, t % 86400 / 3600);
    if (t >= 3600) return format("%lldh%02lldm", t / 3600, t % 3600 / 60);
    if (t >= 60) return format("%lldm%02llds", t / 60, t % 60);
    return format("%llds", t);
}

std::string human_count(double v) {
    if (v >= 1e9) return format("%.2fG", v / 1e9);
    if (v >= 1e6) return format("%.2fM", v / 1e6);
    if (v >= 1e4) return format("%.0fk", v / 1e3);
    if (v >= 1e3) return format("%.1fk", v / 1e3);
    return format("%.0f", v);
}
