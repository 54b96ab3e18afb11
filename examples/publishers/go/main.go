// Ask for a DAG run from Go, with the standard library alone: over HTTP, or over a Redis Stream.
//
//	go run . http daily_sales '{"conf": {"day": "2026-11-20"}}' sales-2026-11-20
//	go run . stream '{"dag_id": "daily_sales", "conf": {"day": "2026-11-20"}, "key": "2026-11-20"}'
//
// Ends with 0, 65 (refused) or 75 (no answer: send it again with the same key).
// Settings: DAGRELAY_URL, DAGRELAY_TOKEN; REDIS_ADDR, REDIS_USER, REDIS_PASSWORD, STREAM.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"
)

// errRefused is an answer that a repetition would not change.
var errRefused = errors.New("refused")

func main() {
	var told string
	var err error
	switch {
	case len(os.Args) == 5 && os.Args[1] == "http":
		told, err = overHTTP(os.Args[2], os.Args[3], os.Args[4])
	case len(os.Args) == 3 && os.Args[1] == "stream":
		told, err = overStream(os.Args[2])
	default:
		fmt.Fprintln(os.Stderr, "usage: http DAG_ID JSON IDEMPOTENCY_KEY | stream JSON")
		os.Exit(64)
	}
	if told != "" {
		fmt.Println(told)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		if errors.Is(err, errRefused) {
			os.Exit(65)
		}
		os.Exit(75)
	}
}

// overHTTP asks the gateway; what had no answer is sent again under the same key, which is one run.
func overHTTP(dagID, body, key string) (string, error) {
	client := http.Client{Timeout: 15 * time.Second}
	address := setting("DAGRELAY_URL", "http://127.0.0.1:8080") + "/v1/dags/" + url.PathEscape(dagID) + "/runs"
	var err error
	for attempt := range 4 {
		if attempt > 0 {
			time.Sleep(250 * time.Millisecond << attempt)
		}
		var request *http.Request
		if request, err = http.NewRequest(http.MethodPost, address, strings.NewReader(body)); err != nil {
			return "", fmt.Errorf("%w: %w", errRefused, err)
		}
		request.Header.Set("Content-Type", "application/json")
		request.Header.Set("Idempotency-Key", strconv.Quote(key))
		if token := os.Getenv("DAGRELAY_TOKEN"); token != "" {
			request.Header.Set("Authorization", "Bearer "+token)
		}
		var answer *http.Response
		if answer, err = client.Do(request); err != nil {
			continue
		}
		told, failed := io.ReadAll(answer.Body)
		answer.Body.Close()
		switch {
		case failed != nil:
			err = failed
		case answer.StatusCode == http.StatusTooManyRequests || answer.StatusCode >= 500:
			err = errors.New(answer.Status)
		case answer.StatusCode >= 300:
			return string(told), fmt.Errorf("%w: %s", errRefused, answer.Status)
		default:
			return string(told), nil
		}
	}
	return "", err
}

// overStream appends to a Redis Stream, and returns the entry's id.
func overStream(body string) (string, error) {
	address := setting("REDIS_ADDR", "127.0.0.1:6379")
	connection, err := net.DialTimeout("tcp", address, 5*time.Second)
	if err != nil {
		return "", err
	}
	defer connection.Close()
	connection.SetDeadline(time.Now().Add(5 * time.Second))
	answers := bufio.NewReader(connection)
	if password := os.Getenv("REDIS_PASSWORD"); password != "" {
		if _, err := do(connection, answers, "AUTH", setting("REDIS_USER", "default"), password); err != nil {
			return "", err
		}
	}
	return do(connection, answers, "XADD", setting("STREAM", "dag-triggers"), "*", "data", body)
}

// do sends one command to Redis (RESP2) and returns its answer, which is a text.
func do(to io.Writer, answers *bufio.Reader, arguments ...string) (string, error) {
	var command strings.Builder
	fmt.Fprintf(&command, "*%d\r\n", len(arguments))
	for _, argument := range arguments {
		fmt.Fprintf(&command, "$%d\r\n%s\r\n", len(argument), argument)
	}
	if _, err := io.WriteString(to, command.String()); err != nil {
		return "", err
	}
	line, err := answers.ReadString('\n')
	if err != nil {
		return "", err
	}
	line = strings.TrimRight(line, "\r\n")
	switch line[0] {
	case '-':
		return "", fmt.Errorf("%w: %s", errRefused, line[1:])
	case '$':
		text, err := answers.ReadString('\n')
		return strings.TrimRight(text, "\r\n"), err
	default:
		return line[1:], nil
	}
}

func setting(name, otherwise string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return otherwise
}
