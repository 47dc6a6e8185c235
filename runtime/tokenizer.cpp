#include "runtime/tokenizer.h"

#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <sstream>

constexpr int32_t kFirstByte = 3;  // ByT5's ids: pad 0, eos 1, unk 2, byte b = b + 3

std::vector<int32_t> Tokenizer::encode(const std::string& text) const {
    std::vector<int32_t> ids;
    if (manifest_.tokenizer_kind == "bytes") {
        for (unsigned char c : text) ids.push_back(int32_t(c) + kFirstByte);
        return ids;
    }
    std::istringstream stream(run_script("--encode", text));
    for (int32_t id; stream >> id;) ids.push_back(id);
    return ids;
}

std::string Tokenizer::decode(const std::vector<int32_t>& ids) const {
    std::string text;
    if (manifest_.tokenizer_kind == "bytes") {
        for (int32_t id : ids)
            if (id >= kFirstByte && id < kFirstByte + 256) text += char(id - kFirstByte);
        return text;
    }
    for (int32_t id : ids) text += (text.empty() ? "" : " ") + std::to_string(id);
    text = run_script("--decode", text);
    if (!text.empty() && text.back() == '\n') text.pop_back();
    return text;
}

std::string Tokenizer::run_script(const std::string& flag, const std::string& argument) const {
    namespace fs = std::filesystem;
    std::string script = (fs::path(program_dir_) / "data" / "tokenize.py").string();
    fs::path environment = fs::path(program_dir_) / ".venv" / "bin" / "python3";
    std::string python = fs::exists(environment) ? environment.string() : "python3";
    std::string assigned = flag + "=" + argument;  // one word, so that text beginning with a dash is no option
    const char* command[] = {python.c_str(), script.c_str(), assigned.c_str(), "--tokenizer", manifest_.tokenizer_path.c_str(), nullptr};
    int channel[2];
    if (pipe(channel) != 0) throw InternalError("pipe failed");
    pid_t child = fork();
    if (child == 0) {
        dup2(channel[1], STDOUT_FILENO);
        close(channel[0]), close(channel[1]);
        execvp(command[0], const_cast<char* const*>(command));
        _exit(127);
    }
    close(channel[1]);
    std::string output;
    char buffer[4096];
    for (ssize_t n; (n = read(channel[0], buffer, sizeof buffer)) > 0;) output.append(buffer, size_t(n));
    close(channel[0]);
    int status = 0;
    waitpid(child, &status, 0);
    if (child < 0 || !WIFEXITED(status) || WEXITSTATUS(status) != 0)
        throw UserError("tokenizer " + manifest_.tokenizer_path + ": " + python + " " + script + " failed; is the Python package of the tokenizer installed?");
    return output;
}
