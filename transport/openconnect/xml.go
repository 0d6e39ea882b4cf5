package openconnect

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"strings"
)

// node is an element of a document, or a piece of text when it has no name. Names
// are kept as written, prefix included: what is opaque goes back as it came.
type node struct {
	name     string
	attrs    []xml.Attr
	text     string
	children []*node
}

// Bounds on documents. openconnect's have some 15 elements and a depth of 4; a
// server's group list may have hundreds of options.
const (
	maxDepth = 16
	maxNodes = 8192
	maxAttrs = 16
)

const xmlHead = `<?xml version="1.0" encoding="UTF-8"?>` + "\n"

// parseXML reads a document of at most limit bytes. It knows elements, attributes, text,
// comments (skipped) and the five entities of XML itself: a DTD is an error, so nothing
// expands.
func parseXML(document []byte, limit int) (*node, error) {
	if len(document) > limit {
		return nil, errTooBig
	}
	d := xml.NewDecoder(bytes.NewReader(document))
	var root *node
	var open []*node
	count := 0
	for {
		token, err := d.RawToken()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, malformed("%v", err)
		}
		if count++; count > maxNodes {
			return nil, errTooBig
		}
		switch token := token.(type) {
		case xml.StartElement:
			if len(open) == maxDepth || len(token.Attr) > maxAttrs {
				return nil, errTooBig
			}
			n := &node{name: qualified(token.Name), attrs: token.Copy().Attr}
			switch {
			case len(open) > 0:
				parent := open[len(open)-1]
				parent.children = append(parent.children, n)
			case root != nil:
				return nil, malformed("a second root element <%.64s>", n.name)
			default:
				root = n
			}
			open = append(open, n)
		case xml.EndElement:
			if len(open) == 0 || open[len(open)-1].name != qualified(token.Name) {
				return nil, malformed("</%.64s> closes nothing", qualified(token.Name))
			}
			open = open[:len(open)-1]
		case xml.CharData:
			if len(open) > 0 {
				parent := open[len(open)-1]
				// A comment may have split a text.
				if last := len(parent.children) - 1; last >= 0 && parent.children[last].name == "" {
					parent.children[last].text += string(token)
				} else {
					parent.children = append(parent.children, &node{text: string(token)})
				}
			} else if len(bytes.TrimSpace(bytes.TrimPrefix(token, []byte("\uFEFF")))) > 0 {
				return nil, malformed("text outside the root element")
			}
		case xml.Directive:
			return nil, malformed("a DTD")
		}
	}
	if root == nil || len(open) > 0 {
		return nil, malformed("the document ends too early")
	}
	return root, nil
}

// qualified is a name as it was written.
func qualified(n xml.Name) string {
	if n.Space == "" {
		return n.Local
	}
	return n.Space + ":" + n.Local
}

// appendXML appends n as markup.
func (n *node) appendXML(b *bytes.Buffer) {
	if n.name == "" {
		xml.EscapeText(b, []byte(n.text)) // a Buffer takes everything
		return
	}
	b.WriteByte('<')
	b.WriteString(n.name)
	for _, a := range n.attrs {
		b.WriteByte(' ')
		b.WriteString(qualified(a.Name))
		b.WriteString(`="`)
		xml.EscapeText(b, []byte(a.Value))
		b.WriteByte('"')
	}
	if len(n.children) == 0 {
		b.WriteString("/>")
		return
	}
	b.WriteByte('>')
	for _, c := range n.children {
		c.appendXML(b)
	}
	b.WriteString("</")
	b.WriteString(n.name)
	b.WriteByte('>')
}

// document writes n as a whole document.
func (n *node) document() []byte {
	var b bytes.Buffer
	b.WriteString(xmlHead)
	n.appendXML(&b)
	b.WriteByte('\n')
	return b.Bytes()
}

// element makes an element of attributes as name, value, name, value.
func element(name string, attrs ...string) *node {
	n := &node{name: name}
	for i := 0; i+1 < len(attrs); i += 2 {
		n.attrs = append(n.attrs, xml.Attr{Name: xml.Name{Local: attrs[i]}, Value: attrs[i+1]})
	}
	return n
}

// add appends an element to n and returns it.
func (n *node) add(name string, attrs ...string) *node {
	c := element(name, attrs...)
	n.children = append(n.children, c)
	return c
}

// addText appends an element that holds a text. An empty one is left out.
func (n *node) addText(name, text string, attrs ...string) {
	if text != "" {
		n.add(name, attrs...).set(text)
	}
}

// set makes text the content of n and returns n.
func (n *node) set(text string) *node {
	n.children = []*node{{text: text}}
	return n
}

// attr is the value of an attribute, "" when it is absent.
func (n *node) attr(name string) string {
	for _, a := range n.attrs {
		if qualified(a.Name) == name {
			return a.Value
		}
	}
	return ""
}

// content is the text of n and of what is in it. A nil node has none.
func (n *node) content() string {
	if n == nil {
		return ""
	}
	if n.name == "" {
		return n.text
	}
	var b strings.Builder
	for _, c := range n.children {
		b.WriteString(c.content())
	}
	return b.String()
}

// xmlName tells whether a name that came as an attribute's value can name an element.
func xmlName(s string) bool {
	for i := range len(s) {
		c := s[i]
		letter := c|0x20 >= 'a' && c|0x20 <= 'z' || c == '_'
		if !letter && (i == 0 || (c < '0' || c > '9') && c != '-' && c != '.') {
			return false
		}
	}
	return s != "" && len(s) <= 64
}
