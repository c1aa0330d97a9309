// Prints what Ollama reads in a Modelfile: its commands, and conversations rendered by its template.
//
// Of Ollama's own packages. In a checkout of github.com/ollama/ollama (tried: August 2026):
//
//	mkdir render && cp render_modelfile.go render/main.go && go build -o render-modelfile ./render
//
// check_modelfile.py runs it.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log"
	"os"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/parser"
	"github.com/ollama/ollama/template"
)

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func main() {
	file, err := os.Open(os.Args[1])
	check(err)
	modelfile, err := parser.ParseFile(file)
	check(err)
	var chats [][]api.Message
	check(json.NewDecoder(os.Stdin).Decode(&chats))
	found := struct {
		Commands []parser.Command `json:"commands"`
		Rendered []string         `json:"rendered"`
	}{Commands: modelfile.Commands}
	values := map[string]string{}
	for _, command := range modelfile.Commands {
		values[command.Name] = command.Args
	}
	parsed, err := template.Parse(values["template"])
	check(err)
	for _, chat := range chats {
		if values["system"] != "" && chat[0].Role != "system" { // as server/routes.go does
			chat = append([]api.Message{{Role: "system", Content: values["system"]}}, chat...)
		}
		var text bytes.Buffer
		check(parsed.Execute(&text, template.Values{Messages: chat}))
		found.Rendered = append(found.Rendered, text.String())
	}
	printed, err := json.Marshal(found)
	check(err)
	fmt.Println(string(printed))
}
